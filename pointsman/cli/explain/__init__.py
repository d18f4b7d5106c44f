"""`pointsman explain`: whether a model runs on a device, how it would be set up there, and how fast it could be at best."""
