//! Users and roles: merged into the target by the server itself, never written over its own collections.

use mongo_core::{
    Error, Namespace, Result,
    bson::{RawDocument, doc},
    transfer::{catalog::USERS_AND_ROLES, write::WriteTarget},
};

use super::Restore;
use crate::repository::{documents_of, manifest::SnapshotNamespace, segment::Content};

/// Whether a namespace holds users or roles, or the version of their form.
pub(crate) fn is_authorization(namespace: &Namespace) -> bool {
    namespace.database() == "admin" && USERS_AND_ROLES.contains(&namespace.collection())
}

impl Restore {
    /// Adds the users and roles of the snapshot to those of the target; one that it has already stays as it is. Gives how many there were.
    ///
    /// The server reads them from collections made for the purpose, which are dropped afterwards.
    pub(super) async fn merge_users_and_roles(&self, namespaces: &[SnapshotNamespace]) -> Result<u64> {
        let admin = self.target.database("admin");
        let mut merge = doc! { "_mergeAuthzCollections": 1, "db": "", "drop": false };
        let mut written = 0;
        let mut temporary = Vec::new();
        // What a restore that died has left: credentials that belong to nobody.
        for name in admin.list_collection_names().await? {
            if name.starts_with(TEMPORARY) && (name.ends_with(".users") || name.ends_with(".roles")) {
                admin.collection::<mongo_core::bson::Document>(&name).drop().await?;
            }
        }
        let mut random = [0; 6];
        getrandom::fill(&mut random).map_err(|error| Error::internal(format!("no randomness to be had: {error}")))?;
        let run = hex::encode(random);
        let result = async {
            for namespace in namespaces {
                let (role, name) = match namespace.namespace().collection() {
                    "system.users" => ("tempUsersCollection", format!("{TEMPORARY}{run}.users")),
                    "system.roles" => ("tempRolesCollection", format!("{TEMPORARY}{run}.roles")),
                    // The version of the form that users have; the target keeps its own.
                    _ => continue,
                };
                temporary.push(name.clone());
                written += self.copy_into(namespace, Namespace::new("admin", name.clone())?).await?;
                merge.insert(role, format!("admin.{name}"));
            }
            if written > 0 {
                admin.run_command(merge).await.map_err(|error| Error::from(error).wrap("users and roles cannot be merged"))?;
            }
            Ok::<_, Error>(())
        }
        .await;
        for name in temporary {
            let dropped = admin.collection::<mongo_core::bson::Document>(&name).drop().await;
            if result.is_ok() {
                dropped?;
            }
        }
        result.map(|()| written)
    }

    async fn copy_into(&self, namespace: &SnapshotNamespace, to: Namespace) -> Result<u64> {
        let mut target = WriteTarget::new(self.target.clone(), to);
        target.write_concern = self.write_concern.clone();
        let mut walk = self.repository.walk(&namespace.root)?;
        let mut written = 0;
        while let Some(entry) = walk.next().await? {
            for segment in self.repository.read_segments(Content::Documents, &[entry.id]).await? {
                let documents: Vec<&RawDocument> = documents_of(&segment).collect::<Result<_>>()?;
                let outcome = target.write(&documents).await?;
                if !outcome.refused.is_empty() {
                    return Err(Error::internal("the target refuses users or roles in a collection made for them"));
                }
                written += outcome.written;
            }
        }
        Ok(written)
    }
}

/// Collections of `admin` that begin so and end in `.users` or `.roles` are made here; backups leave out all that begin so.
const TEMPORARY: &str = "mongo_backup.";
