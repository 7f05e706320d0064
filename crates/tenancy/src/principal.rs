//! Principal of a request: the outcome of authentication.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{DEFAULT_TENANT, KeyId, TenantId};

use crate::key::{KeyDigest, PresentedKey};
use crate::scope::Scopes;

/// Part of a key's record that authentication needs.
#[derive(Clone, Debug)]
pub struct KeyFacts {
    /// Digest of the text of the key.
    pub digest: KeyDigest,
    /// Time from which the key is refused.
    pub expires_at: Option<Timestamp>,
    /// Project of the key; none for an admin key.
    pub project: Option<ProjectFacts>,
    /// True for an admin key that has scopes: it may read the metrics, and nothing else.
    pub is_restricted: bool,
}

/// Project of a key, and the scopes of the key.
#[derive(Clone, Debug)]
pub struct ProjectFacts {
    /// Slug of the project.
    pub tenant: TenantId,
    /// True if the project is archived.
    pub is_archived: bool,
    /// Scopes of the key.
    pub scopes: Scopes,
}

/// Sender of a request.
#[derive(Clone, Debug)]
pub enum Principal {
    /// Holder of a project's key.
    Project(ProjectPrincipal),
    /// Holder of an admin key. An admin key administers projects and reads no data of theirs.
    Admin(KeyId),
    /// Holder of an admin key that may read the metrics of the server, and nothing else.
    Monitor(KeyId),
    /// Operator with access to the data folder, through the command line.
    Operator,
}

/// Holder of a project's key.
#[derive(Clone, Debug)]
pub struct ProjectPrincipal {
    /// Tenant whose data the holder sees.
    pub tenant: TenantId,
    /// Key that was sent; none on a server without keys.
    pub key: Option<KeyId>,
    /// Scopes of the key.
    pub scopes: Scopes,
    /// True if the project is archived: nothing may be created.
    pub is_archived: bool,
}

impl Principal {
    /// Returns the principal of a request to a server without keys.
    pub fn without_keys() -> Self {
        Self::Project(ProjectPrincipal {
            tenant: DEFAULT_TENANT.into(),
            key: None,
            scopes: Scopes::all(),
            is_archived: false,
        })
    }
}

/// Reason why a key is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Unknown, revoked or wrong key. The reasons are not told apart.
    Invalid,
    /// Right key whose lifetime has ended.
    Expired,
}

/// Decides who presented a key, given the record that the store has of its id.
pub fn authenticate(
    presented: PresentedKey,
    found: Option<&KeyFacts>,
    now: Timestamp,
) -> Result<Principal, Denied> {
    let Some(facts) = found.filter(|facts| facts.digest.matches(&presented.digest)) else {
        return Err(Denied::Invalid);
    };
    if facts.expires_at.is_some_and(|end| end <= now) {
        return Err(Denied::Expired);
    }
    Ok(match &facts.project {
        None if facts.is_restricted => Principal::Monitor(presented.id),
        None => Principal::Admin(presented.id),
        Some(project) => Principal::Project(ProjectPrincipal {
            tenant: project.tenant.clone(),
            key: Some(presented.id),
            scopes: project.scopes,
            is_archived: project.is_archived,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::IssuedKey;

    #[test]
    fn key_is_refused_if_unknown_wrong_or_expired() {
        let (key, other) = (IssuedKey::new().unwrap(), IssuedKey::new().unwrap());
        let present = |key: &IssuedKey| PresentedKey::parse(&key.value).unwrap();
        let at = Timestamp::from_millis;
        let facts = KeyFacts {
            digest: key.digest,
            expires_at: Some(at(100)),
            project: None,
            is_restricted: false,
        };
        let decide = |presented, facts, now| authenticate(presented, facts, at(now)).map(drop);
        assert_eq!(decide(present(&key), Some(&facts), 99), Ok(()));
        assert_eq!(decide(present(&key), Some(&facts), 100), Err(Denied::Expired));
        assert_eq!(decide(present(&key), None, 0), Err(Denied::Invalid));
        // The holder of another key learns nothing of this one.
        assert_eq!(decide(present(&other), Some(&facts), 0), Err(Denied::Invalid));
        assert_eq!(decide(present(&other), Some(&facts), 100), Err(Denied::Invalid));
    }
}
