//! Opens containers whose volume keys are known, while a guest's volumes are assembled.

use std::cell::RefCell;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::guest::Source;
use crate::guest::content::{DetectedVolume, VolumeContent};
use crate::guest::volumes::{Unlock, UnlockOutcome, UnlockedVolume};

use super::device::{Decrypted, Decryptor};
use super::header::{Header, HeaderId};
use super::secret::Secret;
use super::unlock::{Unlocked, unlock};

/// What is known of some containers: keys, or why there are none. It has the containers of one guest only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerKeys(pub Vec<(HeaderId, Unlocked)>);

impl ContainerKeys {
    /// What is known of a container.
    pub fn get(&self, id: HeaderId) -> Option<&Unlocked> {
        self.0.iter().find(|(known, _)| *known == id).map(|(_, unlocked)| unlocked)
    }

    /// Bytes of the keys.
    pub fn secret_len(&self) -> usize {
        let keys = self.0.iter().map(|(_, unlocked)| match unlocked {
            Unlocked::Keys(keys) => keys.all().map(|key| key.bytes().len()).sum(),
            Unlocked::NoKeyFits | Unlocked::Problem(_) => 0,
        });
        keys.sum()
    }
}

/// Opens containers with known keys.
pub struct KnownKeys<'a>(pub &'a ContainerKeys);

impl Unlock for KnownKeys<'_> {
    fn unlock(&self, _name: &str, found: &DetectedVolume, source: &Arc<dyn Source>) -> UnlockOutcome {
        match read(found, source) {
            Some(Ok(header)) => self.open(&header, source),
            Some(Err(fact)) => UnlockOutcome::Problem(problem(&fact)),
            None => UnlockOutcome::Unknown,
        }
    }
}

impl KnownKeys<'_> {
    fn open(&self, header: &Header, source: &Arc<dyn Source>) -> UnlockOutcome {
        let fact = match self.0.get(header.id) {
            None => return UnlockOutcome::Locked(header.id),
            Some(Unlocked::NoKeyFits) => "no given key fits".to_owned(),
            Some(Unlocked::Problem(fact)) => fact.clone(),
            Some(Unlocked::Keys(keys)) => {
                let data = header.data(source.size());
                match data.and_then(|data| Ok((Decryptor::new(&data, keys)?, data))) {
                    Ok((decryptor, data)) => {
                        let source = Arc::new(Decrypted { below: Arc::clone(source), decryptor });
                        let (name, id) = (volume_name(&header.uuid), header.id);
                        return UnlockOutcome::Opened(UnlockedVolume { name, source, id, data });
                    }
                    Err(fact) => fact,
                }
            }
        };
        UnlockOutcome::Problem(problem(&fact))
    }
}

/// Tries secrets on one container, which is found while a guest's volumes are assembled.
pub struct Attempt<'a> {
    known: KnownKeys<'a>,
    wanted: HeaderId,
    found: RefCell<Option<(Header, Arc<dyn Source>)>>,
}

impl<'a> Attempt<'a> {
    /// `known` opens the containers that the wanted one lies in.
    pub fn new(known: &'a ContainerKeys, wanted: HeaderId) -> Self {
        Self { known: KnownKeys(known), wanted, found: RefCell::default() }
    }

    /// The result, once the volumes are assembled.
    pub fn unlock(self, secrets: &[Secret]) -> Unlocked {
        match self.found.into_inner() {
            Some((header, source)) => unlock(&header, &*source, secrets),
            None => Unlocked::Problem("its header has changed".to_owned()),
        }
    }
}

impl Unlock for Attempt<'_> {
    fn unlock(&self, _name: &str, found: &DetectedVolume, source: &Arc<dyn Source>) -> UnlockOutcome {
        match read(found, source) {
            Some(Ok(header)) if header.id == self.wanted => {
                let id = header.id;
                self.found.replace(Some((header, Arc::clone(source))));
                UnlockOutcome::Locked(id)
            }
            Some(Ok(header)) => self.known.open(&header, source),
            Some(Err(fact)) => UnlockOutcome::Problem(problem(&fact)),
            None => UnlockOutcome::Unknown,
        }
    }
}

/// The header of a container; `None` if it is not one of LUKS.
fn read(found: &DetectedVolume, source: &Arc<dyn Source>) -> Option<Result<Header, String>> {
    matches!(found.content, VolumeContent::Luks1 | VolumeContent::Luks2).then(|| Header::read(&**source))
}

fn problem(fact: &str) -> String {
    format!("it is encrypted ({}); {fact}", VolumeContent::Luks2)
}

/// `luks-UUID`, as systemd and udisks call it.
fn volume_name(uuid: &str) -> String {
    /// Bytes of a UUID as text.
    const UUID_LEN: usize = 36;
    let is_known = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
    let uuid: String = uuid.chars().filter(is_known).take(UUID_LEN).collect();
    format!("luks-{uuid}")
}
