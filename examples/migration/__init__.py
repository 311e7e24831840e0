"""One service client four times: made by hand of tenacity and pybreaker, and on its way to meshkit. See docs/migration.md."""
