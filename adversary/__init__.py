"""An attacker who has captured GPU nodes guesses what shuffle, shares and padding hide: ``make adversary``."""
