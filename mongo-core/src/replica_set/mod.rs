//! Setting up a replica set and looking after it.
//!
//! - [`ReplicaSetConfig`] describes a replica set and is checked by the server's own rules before a server sees it: the
//!   message is better, and one kind of mistake (a custom `getLastErrorDefaults`) makes a server of 5.0 or later
//!   crash instead of refusing it.
//! - [`initiate`] makes a replica set of servers that were started with `--replSet`.
//! - [`ReplicaSetExt`], on the driver's [`Client`](mongodb::Client): wait for a primary, read and change the
//!   configuration, step down, read the status.
//!
//! ```no_run
//! # async fn example() -> mongo_core::Result<()> {
//! use std::time::Duration;
//!
//! use mongo_core::ConnectOptions;
//! use mongo_core::replica_set::{Member, ReplicaSetConfig, ReplicaSetExt, initiate};
//!
//! let config = ReplicaSetConfig::new("rs0")
//!     .with_member(Member::new("a.example:27017").with_priority(2.0))
//!     .with_member(Member::new("b.example:27017"))
//!     .with_member(Member::new("c.example:27017").delayed_by(Duration::from_secs(3600)).non_voting())
//!     .with_member(Member::arbiter("d.example:27017"));
//! initiate(&ConnectOptions::from_uri("mongodb://a.example:27017")?, &config).await?;
//!
//! let set = ConnectOptions::from_uri("mongodb://a.example,b.example/?replicaSet=rs0")?;
//! let deployment = mongo_core::connect(set).await?;
//! let primary = deployment.client().wait_for_primary(Duration::from_secs(30)).await?;
//! println!("{} is primary", primary.host);
//! # Ok(()) }
//! ```

mod admin;
mod config;
mod status;
mod wire;

pub use admin::{OnLag, Primary, ReconfigureMode, ReplicaSetExt, StepDownSettings, initiate};
pub use config::{Member, ReplicaSetConfig, ReplicaSetSettings};
pub use status::{MemberState, MemberStatus, ReplicaSetStatus};
