"""Sites, ports, layers and attachments: what every method and every backbone share."""
