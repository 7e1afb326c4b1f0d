"""What a base model is: how it is loaded, set up and described. Must not know adapters, requests or queues."""
