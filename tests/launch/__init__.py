"""Starting ranks on this machine and looking after them."""
