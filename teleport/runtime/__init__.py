"""What PyTorch is asked for around a teleport: transaction, precision, ranks, threads, clock."""
