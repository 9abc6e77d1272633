"""The base model before a weight is read: class, shapes, targets, ranks, plan."""
