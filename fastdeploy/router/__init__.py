"""The router: one endpoint in front of many servers. A request goes downstream -> app -> exchange -> upstream."""
