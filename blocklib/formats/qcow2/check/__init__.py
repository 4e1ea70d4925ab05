"""The check of a qcow2 image: every reference counted, and compared with what the image stores.  Nothing is written here."""
