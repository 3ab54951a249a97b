"""What stands beside Toppings on one checkpoint, each as a process that answers the same requests."""
