//! Reservations of a part of a pool.
