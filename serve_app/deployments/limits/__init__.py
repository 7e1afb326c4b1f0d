"""What keys may ask for, counted over all ingress replicas. Must not know requests' contents."""
