"""A device learns when to ask: what its escalations and audits taught, and which threshold follows from it."""
