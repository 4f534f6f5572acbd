"""What runs beside a fleet of devices."""
