//! Notices plugin files that come, change and go while the server runs.
//!
//! The directories are looked at once a second, which needs no other right than reading them and
//! works on every file system; a change counts when two looks in a row agree on it, so that a
//! file is not taken while it is being copied.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{Life, Plugin, Plugins, Request, Workshop};
use crate::loader::{self, Found, LoadError, PluginKind, Stamp};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// What a look has found, by path.
type Look = HashMap<PathBuf, (PluginKind, Stamp)>;

/// Watches until the supervisor is gone.
pub(super) async fn run(plugins: Weak<Plugins>, workshop: Arc<Workshop>) {
    let mut seen = look(&workshop).await.unwrap_or_default();
    // Nothing yet: what came or changed between loading and this first look is told from what was
    // loaded by reading it once more.
    let mut settled = Look::new();
    let mut complaint = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = match look(&workshop).await {
            Ok(now) => now,
            // A location that is gone says nothing of its plugins, which go on.
            Err(error) => {
                if complaint.as_ref() != Some(&error) {
                    tracing::warn!("the plugins' files are not watched for now: {error}");
                    complaint = Some(error);
                }
                continue;
            }
        };
        complaint = None;
        let Some(plugins) = plugins.upgrade() else {
            return;
        };
        for (path, found) in &now {
            let is_stable = seen.get(path) == Some(found);
            if is_stable && settled.get(path) != Some(found) {
                changed(&plugins, &workshop, path.clone(), found.0).await;
                settled.insert(path.clone(), *found);
            }
        }
        let is_gone = |path: &PathBuf| !now.contains_key(path) && !seen.contains_key(path);
        settled.retain(|path, _| !is_gone(path));
        plugins.remove(is_gone);
        seen = now;
    }
}

async fn look(workshop: &Arc<Workshop>) -> Result<Look, String> {
    let workshop = Arc::clone(workshop);
    let looking = tokio::task::spawn_blocking(move || {
        let files = loader::search(&workshop.config.locations)?;
        let stamped = files.into_iter().map(|(path, kind)| {
            let stamp = loader::stamp(&path);
            (path, (kind, stamp))
        });
        Ok(stamped.collect())
    });
    let looked = looking.await.map_err(|error| error.to_string())?;
    looked.map_err(|error: LoadError| error.to_string())
}

/// A file that is new, or not what it was.
async fn changed(
    plugins: &Arc<Plugins>,
    workshop: &Arc<Workshop>,
    path: PathBuf,
    kind: PluginKind,
) {
    let known = plugins.at(&path);
    let name: Arc<str> = match &known {
        Some(plugin) => Arc::clone(&plugin.name),
        None => {
            let registry = plugins.registry.read();
            let is_free = |name: &str| registry.plugins.iter().all(|plugin| &*plugin.name != name);
            loader::name_for(&path, is_free).into()
        }
    };
    let reading = {
        let (workshop, path, name) = (Arc::clone(workshop), path.clone(), Arc::clone(&name));
        tokio::task::spawn_blocking(move || {
            loader::read(name, &path, kind, &workshop.config.policy)
        })
    };
    // The other outcome is the end of the server.
    let Ok(found) = reading.await else {
        return;
    };
    match known {
        Some(_) if !found.manifest.enabled => plugins.remove(|it| *it == path),
        Some(plugin) => {
            if plugin.is_other(&found) {
                // What comes of it is logged and shown; nobody waits.
                let (reply, _outcome) = oneshot::channel();
                if plugin.requests.try_send(Request::Reload(reply)).is_err() {
                    tracing::warn!(
                        plugin = &*name,
                        "plugin `{name}` changed and is too busy to be reloaded"
                    );
                }
            }
        }
        None if !found.manifest.enabled => {}
        None => {
            tracing::info!(plugin = &*name, "plugin `{name}` is new");
            plugins.start_new(workshop, found);
        }
    }
}

impl Plugin {
    /// Whether what was read differs from what runs.
    fn is_other(&self, found: &Found) -> bool {
        let shared = self.shared.lock();
        shared.sha256 != found.sha256
            || shared.manifest != found.manifest
            || shared.origin != found.origin.as_ref().ok().copied()
    }
}

impl Plugins {
    fn at(&self, path: &std::path::Path) -> Option<Arc<Plugin>> {
        let registry = self.registry.read();
        let found = registry.plugins.iter().find(|plugin| plugin.path == path);
        found.cloned()
    }

    /// Gives a plugin that came while the server runs its task.
    fn start_new(&self, workshop: &Arc<Workshop>, found: Found) {
        let waiting = {
            let mut registry = self.registry.write();
            registry.add(found);
            std::mem::take(&mut registry.waiting)
        };
        let mut tasks = self.tasks.lock();
        tasks.retain(|task| !task.is_finished());
        for (plugin, inbox, found) in waiting {
            let life = Life::new(plugin, workshop, inbox, &self.ending);
            tasks.push(tokio::spawn(life.run(found)));
        }
    }

    /// Forgets plugins whose files are gone; their tasks end their runs as at the end of the server.
    fn remove(&self, is_gone: impl Fn(&PathBuf) -> bool) {
        // Asked after every look, and mostly for nothing, which nobody should wait for.
        let is_any = {
            let registry = self.registry.read();
            registry.plugins.iter().any(|plugin| is_gone(&plugin.path))
        };
        if !is_any {
            return;
        }
        let mut registry = self.registry.write();
        registry.plugins.retain(|plugin| {
            let stays = !is_gone(&plugin.path);
            if !stays {
                let name = &plugin.name;
                tracing::info!(plugin = &**name, "plugin `{name}` was removed, and stops");
                plugin.over.cancel();
            }
            stays
        });
    }
}
