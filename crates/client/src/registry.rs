//! The registry of services.
