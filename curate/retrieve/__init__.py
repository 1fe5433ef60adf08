"""Pool images are chosen by nearness to seed sets or by cells."""
