"""What people look at: page, README, model card, hub, trackers."""
