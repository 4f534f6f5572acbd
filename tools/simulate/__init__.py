"""`skerry simulate`: a fleet of devices without models, at one real broker and one real edge service."""
