"""What a server must withstand: odd requests, bad adapters, faults; and how to tell whether it did."""
