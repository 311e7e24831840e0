"""A learning platform in five services, written with meshkit; README.md beside this file says who does what."""
