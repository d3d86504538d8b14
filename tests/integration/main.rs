//! One binary for all integration tests: servers that tests can share are started once.

mod awkward;
mod backup;
mod bad_input;
mod connecting;
mod consistency;
mod core_data;
mod core_replica_set;
mod damage;
mod faults;
mod fidelity;
mod kill;
mod restore_modes;
mod support;
mod transfer;
