#![doc = include_str!("../README.md")]

mod class;
mod cost;
mod instruments;
mod job;
mod manager;
mod permit;
mod rate;
mod schedule;
mod submission;

pub use class::{Class, Classes, RESERVED_FOR, Rate};
pub use job::{Job, JobStatus};
pub use manager::{ClassStatus, Limits, Manager, ManagerSettings, Slots};
pub use permit::Permit;
pub use schedule::Access;
pub use submission::Submission;
