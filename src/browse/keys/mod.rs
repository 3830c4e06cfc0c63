//! The keys of encrypted volumes: what the user gave, and what became of it.
//!
//! Promises:
//! - A key is derived once. What a container's header and some secrets have given is remembered, failures as
//!   well, as long as the secrets are given.
//! - A worker gets the keys of the containers of its own guest, and of no other.
//! - The table is read again when it changes. One that cannot be read changes nothing, and is logged.

mod file;
mod table;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::guest::luks::{ContainerKeys, HeaderId, Secret, Unlocked};
use crate::guest::volumes::VolumeLayout;

use super::Browser;
use super::disk::BrowsedDisk;
use super::disk_contents::Exchange;
use super::validate::{check_unlocked, protocol_violation};
use super::worker::Worker;
use super::worker::protocol::{Answer, Request};
use crate::error::ErrorKind;

use file::FileStamp;
use table::{KeyRule, KeyTable};

/// Results that are remembered.
const REMEMBERED: NonZero<usize> = NonZero::new(1024).expect("not zero");
/// How often it is checked whether the table has changed.
const CHECK_PERIOD: Duration = Duration::from_secs(1);
/// Containers of one guest that are opened at most.
const CONTAINER_LIMIT: usize = 64;

/// The keys of a mount or a command.
#[derive(Debug, Default)]
pub struct Keyring {
    /// The file of the table.
    path: Option<PathBuf>,
    /// A key for all containers.
    single: Option<KeyRule>,
    state: Mutex<KeyringState>,
    /// Keys are derived one at a time: each may take gigabytes.
    deriving: Mutex<()>,
}

struct KeyringState {
    table: KeyTable,
    /// Counts the tables that were read.
    version: u64,
    checked: Instant,
    results: LruCache<(HeaderId, Vec<SecretKey>), Unlocked>,
}

/// A secret as a part of a key of a map.
#[derive(Clone, PartialEq, Eq)]
struct SecretKey(Secret);

impl std::hash::Hash for SecretKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.bytes().hash(state);
    }
}

impl std::fmt::Debug for KeyringState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyringState").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Default for KeyringState {
    fn default() -> Self {
        let (table, results) = (KeyTable::default(), LruCache::new(REMEMBERED));
        Self { table, version: 0, checked: Instant::now(), results }
    }
}

impl Keyring {
    /// With the table in the file `path`, and `single` as a key for every encrypted volume. From now on this
    /// process can neither be traced by its user nor leave a core dump.
    pub fn open(path: Option<&Path>, single: Option<&Path>) -> Result<Arc<Self>> {
        let mut keyring = Self::default();
        if path.is_none() && single.is_none() {
            return Ok(Arc::new(keyring));
        }
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .map_err(|error| Error::io("forbidding core dumps", error))?;
        if let Some(path) = path {
            let path = std::path::absolute(path).map_err(|error| Error::io("finding the keys", error))?;
            keyring.state.get_mut().table = KeyTable::read(&path)?;
            keyring.path = Some(path);
        }
        keyring.single = single.map(table::whole_file).transpose()?.map(KeyRule::for_all);
        Ok(Arc::new(keyring))
    }

    /// The version of the table, which is read again if it has changed.
    pub(super) fn version(&self) -> u64 {
        let Some(path) = &self.path else { return 0 };
        let mut state = self.state.lock();
        if state.checked.elapsed() < CHECK_PERIOD {
            return state.version;
        }
        state.checked = Instant::now();
        let is_new = |(path, stamp): &(PathBuf, Option<FileStamp>)| FileStamp::now(path) != *stamp;
        if !state.table.files.iter().any(is_new) {
            return state.version;
        }
        match KeyTable::read(path) {
            Ok(table) => {
                let is_given = |secret: &SecretKey| {
                    let mut rules = table.rules.iter().chain(&self.single);
                    rules.any(|rule| rule.secret == secret.0)
                };
                let keys = state.results.iter().map(|(key, _)| key.clone());
                let old: Vec<_> = keys.filter(|(_, secrets)| !secrets.iter().all(is_given)).collect();
                for key in old {
                    state.results.pop(&key);
                }
                state.table = table;
                state.version += 1;
            }
            Err(error) => {
                tracing::warn!("{error}; the keys that were read before stay in use");
                // Not again before the next change.
                for (path, stamp) in &mut state.table.files {
                    *stamp = FileStamp::now(path);
                }
            }
        }
        state.version
    }

    /// The secrets for a container, without repetitions.
    fn secrets(&self, uuid: &str, chain: &Path) -> Vec<SecretKey> {
        let mut secrets: Vec<SecretKey> = Vec::new();
        let state = self.state.lock();
        for rule in self.single.iter().chain(&state.table.rules).filter(|rule| rule.is_for(uuid, chain)) {
            if !secrets.iter().any(|known| known.0 == rule.secret) {
                secrets.push(SecretKey(rule.secret.clone()));
            }
        }
        secrets
    }
}

impl Browser {
    /// Adds what the given keys make of the locked volumes of a layout; whether there is anything new.
    pub(super) fn unlock_more(
        &self,
        disks: &[BrowsedDisk],
        layout: &VolumeLayout,
        known: &mut ContainerKeys,
    ) -> Result<bool> {
        let count = known.0.len();
        for locked in &layout.locked {
            let Some(volume) = layout.volumes.get(locked.volume) else { continue };
            if known.get(locked.id).is_some() || known.0.len() >= CONTAINER_LIMIT {
                continue;
            }
            let uuid = volume.uuid.as_deref().unwrap_or_default();
            let secrets = self.keyring.secrets(uuid, &disks[0].id().chain);
            if secrets.is_empty() {
                continue;
            }
            let unlocked = self.derive(disks, known, locked.id, secrets)?;
            known.0.push((locked.id, unlocked));
        }
        Ok(known.0.len() > count)
    }

    fn derive(
        &self,
        disks: &[BrowsedDisk],
        known: &ContainerKeys,
        id: HeaderId,
        secrets: Vec<SecretKey>,
    ) -> Result<Unlocked> {
        let key = (id, secrets);
        let remembered = || self.keyring.state.lock().results.get(&key).cloned();
        if let Some(unlocked) = remembered() {
            return Ok(unlocked);
        }
        let _one = self.keyring.deriving.lock();
        if let Some(unlocked) = remembered() {
            return Ok(unlocked);
        }
        let secrets = key.1.iter().map(|secret| secret.0.clone()).collect();
        let sizes = disks.iter().map(BrowsedDisk::size).collect();
        let request = Request::Unlock { sizes, keys: known.clone(), id, secrets };
        // A process of its own, which ends with the answer.
        let worker = Worker::unlocker(&self.pool);
        let unlocked = match worker.ask(&request, &Exchange::new(disks, &self.digests)) {
            Ok((Answer::Unlocked(unlocked), _)) => {
                check_unlocked(&unlocked)?;
                unlocked
            }
            Ok(_) => return Err(protocol_violation()),
            Err(error) if error.kind() == ErrorKind::Limit => Unlocked::Problem(error.to_string()),
            Err(error) => return Err(error),
        };
        self.keyring.state.lock().results.push(key, unlocked.clone());
        Ok(unlocked)
    }
}
