"""What requests carry: fields, filters, pages and settings, and what may be wrong with them."""
