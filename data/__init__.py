"""What the scripts run on without a hub: the embedded task and a model for it."""
