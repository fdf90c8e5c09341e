"""The teacher's signals: live or cached, behind one interface."""
