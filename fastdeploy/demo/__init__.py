"""The small real model that a newcomer runs without any model hub: where it comes from and how it is converted."""
