"""An MQTT broker for demos and single sites."""
