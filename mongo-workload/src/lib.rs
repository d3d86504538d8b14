#![doc = include_str!("../README.md")]

mod class;
mod cost;
mod gate;
mod instruments;
mod job;
mod limit;
mod load;
mod manager;
mod operations;
mod permit;
mod route;
mod schedule;
mod submission;

pub use class::{Class, Classes, RESERVED_FOR, Rule};
pub use gate::ManagerGate;
pub use job::{Job, JobStatus};
pub use limit::AdaptiveSlots;
pub use load::{Load, LoadSignal, Tickets};
pub use manager::{ClassStatus, Limits, Manager, ManagerSettings, SlotPolicy, Slots};
pub use mongo_core::rate::Rate;
pub use permit::Permit;
pub use route::{MemberRole, MemberState, ReadRoute, ReadRouter, ReadToken, RouterSettings, Target, Tier};
pub use schedule::Access;
pub use submission::Submission;
