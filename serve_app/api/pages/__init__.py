"""The pages that people open in a browser, and whether the service is up. Must not know the image routes."""
