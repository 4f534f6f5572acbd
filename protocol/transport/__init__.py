"""Messages over MQTT: one seam, the real client and an in-memory bus."""
