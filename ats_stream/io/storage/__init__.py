"""Where bytes lie: folders, zip files, object stores and web servers behind one small protocol."""
