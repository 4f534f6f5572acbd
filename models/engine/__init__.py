"""One model behind one interface: see base.py for the contract."""
