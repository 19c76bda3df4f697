"""Selection: the prompt per query, and the gate that decides whether choosing pays."""
