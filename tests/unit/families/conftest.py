"""What must come before anything else imports transformers."""

from tests.tiny_families.vision import has_torchvision

has_torchvision()
