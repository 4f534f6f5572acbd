"""What crosses a wire, and what both ends agree on: messages, errors, configuration files."""
