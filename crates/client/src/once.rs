//! Effect markers.
