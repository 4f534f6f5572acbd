"""Personal data in requests: found, hidden from others, put back for the reader."""

from agent.privacy.detect import Detector
from agent.privacy.guard import Guard, Outcome, Privacy
from agent.privacy.span import Kind, Span

__all__ = ["Detector", "Guard", "Kind", "Outcome", "Privacy", "Span"]
