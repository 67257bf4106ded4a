"""The OpenAPI document, by resource."""
