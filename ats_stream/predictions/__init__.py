"""What a prediction leaves behind: one record a slide, tables, attention images, boxes and embeddings."""
