"""What differs from family to family, as data: spellings and structure of adapter files. Must not import torch."""
