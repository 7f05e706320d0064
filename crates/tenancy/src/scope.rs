//! Scopes: permissions of a project's key.

macro_rules! scopes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal;)+) => {
        /// Permission of a key, with the name that OpenAI uses.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Scope {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Scope {
            /// Every scope.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Returns the name of the scope.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

scopes! {
    /// Read batches, and the plugins that served them.
    BatchRead = "api.batch.read";
    /// Create and cancel batches.
    BatchWrite = "api.batch.write";
    /// List the credentials of the project, without their secrets.
    CredentialsRead = "api.credentials.read";
    /// Set and delete credentials of the project.
    CredentialsWrite = "api.credentials.write";
    /// List, read and download files.
    FilesRead = "api.files.read";
    /// Upload and delete files.
    FilesWrite = "api.files.write";
    /// List models and plugins.
    ModelRead = "api.model.read";
    /// Send online requests to models.
    ModelRequest = "api.model.request";
    /// Read the usage and the costs of the project.
    UsageRead = "api.usage.read";
    /// List webhook endpoints and their deliveries, without their secrets.
    WebhooksRead = "api.webhooks.read";
    /// Create, change, test and delete webhook endpoints.
    WebhooksWrite = "api.webhooks.write";
}

/// Name of the scope of an admin key that may read the metrics of the server, and nothing else.
pub const METRICS_SCOPE: &str = "metrics.read";

impl Scope {
    /// Returns the scope with a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|scope| scope.as_str() == name)
    }
}

/// Set of scopes, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scopes(u32);

impl FromIterator<Scope> for Scopes {
    fn from_iter<T: IntoIterator<Item = Scope>>(scopes: T) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | 1 << scope as u32))
    }
}

impl Scopes {
    /// Returns the set of all scopes, which a key has unless its creator names some.
    pub fn all() -> Self {
        Scope::ALL.iter().copied().collect()
    }

    /// Parses the names of scopes; fails with the first unknown name, or with an empty text if
    /// there is no name: a key without a scope could do nothing.
    pub fn parse<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let scopes: Self = names
            .into_iter()
            .map(|name| Scope::parse(name).ok_or(name))
            .collect::<Result<_, _>>()?;
        if scopes.0 == 0 { Err("") } else { Ok(scopes) }
    }

    /// Returns the set of the names that this version knows, of a key that the store has.
    pub fn from_stored(names: &[String]) -> Self {
        names.iter().filter_map(|name| Scope::parse(name)).collect()
    }

    /// Returns true if the set has the scope.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & 1 << scope as u32 != 0
    }

    /// Returns the names, in the order of [`Scope::ALL`].
    pub fn names(self) -> Vec<String> {
        let scopes = Scope::ALL.iter().filter(|scope| self.contains(**scope));
        scopes.map(|scope| scope.as_str().to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_parsed_by_name_and_an_unknown_or_missing_name_is_an_error() {
        let some = Scopes::parse(["api.files.read", "api.batch.read"]).unwrap();
        assert_eq!(some.names(), ["api.batch.read", "api.files.read"]);
        assert!(some.contains(Scope::FilesRead) && !some.contains(Scope::FilesWrite));
        assert_eq!(Scopes::parse(["api.files.read", "api.files.*"]), Err("api.files.*"));
        assert_eq!(Scopes::parse([]), Err(""));
        let stored = ["api.batch.write".to_owned(), "of a later version".to_owned()];
        assert_eq!(Scopes::from_stored(&stored).names(), ["api.batch.write"]);
    }
}
