"""What lift-int-casts is made of: the edits, the words and findings of its report, tables that can be restored."""
