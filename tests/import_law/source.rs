//! Parsed source files: their imports, identifiers and definitions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A parsed source file.
pub struct Source {
    /// Path below the root of the project, such as `src/domain/money.rs`.
    pub path: String,
    pub text: String,
    syntax: syn::File,
    tokens: TokenStream,
}

impl Source {
    pub fn parse(path: &str, text: &str) -> Source {
        Source {
            path: path.to_owned(),
            text: text.to_owned(),
            syntax: syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}")),
            tokens: text.parse().unwrap(),
        }
    }

    /// Returns the module path in the crate, such as `["domain", "money"]`. Empty for the root.
    pub fn module(&self) -> Vec<String> {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        let path = path.trim_end_matches("/mod");
        path.split('/')
            .filter(|part| !["lib", "main", "mod"].contains(part))
            .map(str::to_owned)
            .collect()
    }

    /// Returns the room, such as `domain`. `lib` and `main` for the roots.
    pub fn room(&self) -> String {
        let root = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        self.module()
            .into_iter()
            .next()
            .unwrap_or_else(|| root.to_owned())
    }

    /// Returns every path that the file imports or uses, resolved from the root of the crate.
    ///
    /// A path that starts with another name may lead to a child module or to another crate. It is
    /// resolved as if it led to a child.
    pub fn paths(&self) -> Vec<Vec<String>> {
        self.visit_paths().found
    }

    /// Returns the names that the file imports or re-exports, each with the path it stands for.
    pub fn bindings(&self) -> BTreeMap<String, Vec<String>> {
        self.visit_paths().bindings
    }

    fn visit_paths(&self) -> Paths {
        let mut paths = Paths {
            module: self.module(),
            found: Vec::new(),
            bindings: BTreeMap::new(),
        };
        paths.visit_file(&self.syntax);
        paths
    }

    /// Returns the rooms that the file imports, other than its own.
    pub fn imported_rooms(&self) -> BTreeSet<String> {
        let mut rooms: BTreeSet<String> = self
            .paths()
            .into_iter()
            .filter_map(|path| path.into_iter().next())
            .collect();
        rooms.remove(&self.room());
        rooms
    }

    /// Returns the modules, types and functions that the file defines, outside macros.
    pub fn definitions(&self) -> Vec<Definition> {
        let mut definitions = Definitions::default();
        definitions.visit_file(&self.syntax);
        definitions.0
    }

    /// Returns every identifier in the code, without comments and strings.
    pub fn identifiers(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut streams = vec![self.tokens.clone()];
        while let Some(stream) = streams.pop() {
            for token in stream {
                match token {
                    TokenTree::Ident(name) => drop(found.insert(name.to_string())),
                    TokenTree::Group(group) => streams.push(group.stream()),
                    TokenTree::Punct(_) | TokenTree::Literal(_) => {}
                }
            }
        }
        found
    }
}

/// Collects paths into the own crate while visiting a file.
struct Paths {
    /// Module that the visitor is in.
    module: Vec<String>,
    found: Vec<Vec<String>>,
    /// Imported names with their resolved paths.
    bindings: BTreeMap<String, Vec<String>>,
}

impl Paths {
    /// Resolves a path from the module that it stands in.
    fn add(&mut self, path: &[String]) {
        let mut base = match path.first().map(String::as_str) {
            Some("crate" | "stripe_reconciler") => Vec::new(),
            Some(_) => self.module.clone(),
            None => return,
        };

        for part in path {
            match part.as_str() {
                "crate" | "stripe_reconciler" | "self" => {}
                "super" => drop(base.pop()),
                name => base.push(name.to_owned()),
            }
        }
        self.found.push(base);
    }

    fn bind(&mut self, name: &syn::Ident, path: &[String]) {
        self.add(path);
        if let Some(resolved) = self.found.last() {
            self.bindings.insert(name.to_string(), resolved.clone());
        }
    }

    fn add_tree(&mut self, tree: &syn::UseTree, prefix: &[String]) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Name(name) => self.bind(&name.ident, &with(&name.ident)),
            syn::UseTree::Rename(rename) => self.bind(&rename.rename, &with(&rename.ident)),
            syn::UseTree::Glob(_) => self.add(&[prefix, &["*".to_owned()]].concat()),
            syn::UseTree::Group(group) => {
                for item in &group.items {
                    self.add_tree(item, prefix);
                }
            }
        }
    }

    /// Finds paths in the tokens of a macro, which syn does not parse.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) if colons == 2 || path.is_empty() => {
                    path.push(name.to_string());
                }
                TokenTree::Ident(name) => {
                    self.add(&std::mem::take(&mut path));
                    path.push(name.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    self.add(&std::mem::take(&mut path));
                    self.add_tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.add(&std::mem::take(&mut path));
                }
            }
            colons = 0;
        }
        self.add(&path);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        if names.len() > 1 {
            self.add(&names);
        }
        visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.add_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        self.add_tokens(item.mac.tokens.clone());
    }
}

/// Kind of a definition that has a name of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Module,
    Type,
    Function,
}

/// A module, type or function.
pub struct Definition {
    pub kind: Kind,
    pub name: String,
    pub lines: usize,
}

/// Collects definitions while visiting a file.
#[derive(Default)]
struct Definitions(Vec<Definition>);

impl Definitions {
    fn add(&mut self, kind: Kind, name: &syn::Ident, item: &impl Spanned) {
        let span = item.span();
        self.0.push(Definition {
            kind,
            name: name.to_string(),
            lines: span.end().line + 1 - span.start().line,
        });
    }
}

impl<'ast> Visit<'ast> for Definitions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(Kind::Function, &item.sig.ident, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(Kind::Function, &item.sig.ident, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.add(Kind::Type, &item.ident, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.add(Kind::Type, &item.ident, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.add(Kind::Type, &item.ident, item);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.add(Kind::Type, &item.ident, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.add(Kind::Module, &item.ident, item);
        visit::visit_item_mod(self, item);
    }
}

/// Returns the source files below these folders of the project.
pub fn sources(folders: &[&str]) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pending: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut sources = Vec::new();
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap();
                sources.push(Source::parse(
                    name,
                    &std::fs::read_to_string(&path).unwrap(),
                ));
            }
        }
    }

    sources.sort_by(|one, other| one.path.cmp(&other.path));
    sources
}
