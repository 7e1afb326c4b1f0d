"""An adapter file of any known form -> what it changes in each layer. Must not know live weights or requests."""
