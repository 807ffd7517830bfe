"""What the scripts are made of; private."""
