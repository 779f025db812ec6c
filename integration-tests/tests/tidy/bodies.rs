//! The bodies of the files in the state directory: the last part of docs/FORMATS.md is made of the types that are
//! serialized. `make messages` writes it, and a test compares.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;

use syn::visit::Visit;

use super::{product, root};

/// What the sealed files contain, in the order of the page.
const ROOTS: [&str; 3] = ["SavedPlan", "Manifest", "Staging"];
/// Where the part begins that is made of the code.
const HEADING: &str = "## Bodies of sealed files\n";

/// Stands for a type that the page cannot show.
const UNKNOWN: &str = "[unknown]";

/// A type of the product, as the page shows it.
struct Shown {
    /// What it is: its fields or its variants, in order.
    rows: Vec<[String; 3]>,
    /// What its second column is.
    column: &'static str,
    /// The names of the types in it.
    uses: Vec<String>,
}

#[derive(Default)]
struct Types {
    shown: BTreeMap<String, Shown>,
    aliases: BTreeMap<String, String>,
}

/// The first sentence of a documentation comment.
fn meaning(attributes: &[syn::Attribute]) -> String {
    let mut text = String::new();
    for attribute in attributes {
        if let syn::Meta::NameValue(pair) = &attribute.meta
            && pair.path.is_ident("doc")
            && let syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(line), .. }) = &pair.value
        {
            text.push_str(&line.value());
        }
    }
    text.trim().trim_end_matches('.').replace('|', "\\|")
}

/// A type as it is written, and the names in it.
#[derive(Default)]
struct Written {
    text: String,
    names: Vec<String>,
}

impl Written {
    fn of(ty: &syn::Type) -> Self {
        let mut written = Self::default();
        written.add(ty);
        written
    }

    fn add(&mut self, ty: &syn::Type) {
        match ty {
            syn::Type::Path(path) => {
                let Some(last) = path.path.segments.last() else { return };
                self.text.push_str(&last.ident.to_string());
                self.names.push(last.ident.to_string());
                if let syn::PathArguments::AngleBracketed(arguments) = &last.arguments {
                    self.list(
                        ["<", ">"],
                        arguments.args.iter().filter_map(|argument| match argument {
                            syn::GenericArgument::Type(ty) => Some(ty),
                            _ => None,
                        }),
                    );
                }
            }
            syn::Type::Tuple(tuple) => self.list(["(", ")"], tuple.elems.iter()),
            syn::Type::Array(array) => {
                self.text.push('[');
                self.add(&array.elem);
                let length = match &array.len {
                    syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Int(length), .. }) => {
                        length.base10_digits().to_owned()
                    }
                    syn::Expr::Path(path) => path.path.segments.last().unwrap().ident.to_string(),
                    _ => UNKNOWN.to_owned(),
                };
                self.text.push_str(&format!("; {length}]"));
            }
            _ => self.text.push_str(UNKNOWN),
        }
    }

    fn list<'t>(&mut self, brackets: [&str; 2], types: impl Iterator<Item = &'t syn::Type>) {
        self.text.push_str(brackets[0]);
        for (index, ty) in types.enumerate() {
            if index > 0 {
                self.text.push_str(", ");
            }
            self.add(ty);
        }
        self.text.push_str(brackets[1]);
    }
}

fn is_serialized(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("derive")
            && list.tokens.clone().into_iter().any(|token| token.to_string() == "Serialize")
    })
}

impl<'ast> Visit<'ast> for Types {
    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        if !is_serialized(&item.attrs) {
            return;
        }
        let (mut rows, mut uses) = (Vec::new(), Vec::new());
        for field in &item.fields {
            let Written { text, names } = Written::of(&field.ty);
            let name = field.ident.as_ref().map_or("its value".to_owned(), ToString::to_string);
            rows.push([name, format!("`{text}`"), meaning(&field.attrs)]);
            uses.extend(names);
        }
        self.shown.insert(item.ident.to_string(), Shown { rows, column: "type", uses });
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        if !is_serialized(&item.attrs) {
            return;
        }
        let (mut rows, mut uses) = (Vec::new(), Vec::new());
        for (number, variant) in item.variants.iter().enumerate() {
            let mut with = Vec::new();
            for field in &variant.fields {
                let Written { text, names } = Written::of(&field.ty);
                with.push(match &field.ident {
                    Some(name) => format!(", {name}: `{text}`"),
                    None => format!(", `{text}`"),
                });
                uses.extend(names);
            }
            let name = variant.ident.to_string();
            rows.push([name, format!("{number}{}", with.concat()), meaning(&variant.attrs)]);
        }
        self.shown.insert(item.ident.to_string(), Shown { rows, column: "number, content", uses });
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        if item.generics.params.is_empty()
            && let syn::Type::Path(_) = &*item.ty
        {
            let name = item.ident.to_string();
            let Written { text, names } = Written::of(&item.ty);
            self.aliases.insert(name.clone(), text);
            let alias = Shown { rows: Vec::new(), column: "", uses: names };
            self.shown.entry(name).or_insert(alias);
        }
    }
}

/// The part of the page that is made of the code.
fn bodies() -> String {
    let mut types = Types::default();
    for (_, text) in product() {
        types.visit_file(&syn::parse_file(&text).unwrap());
    }
    let mut page = format!(
        "{HEADING}\nThis part is made of the code by `make messages`. The body of `plan` is a `SavedPlan`, \
         that of `sealed` a `Manifest`, that of `staging` a `Staging`; other types follow in the order in which \
         they are used.\n\n\
         | type | encoding |\n|---|---|\n\
         | `u8`, `bool` | one byte |\n\
         | `u32`, `u64`, `usize` | varint: seven bits a byte, the least significant first; the high bit says that \
         another byte follows |\n\
         | `i32`, `i64` | varint of 2n for n ≥ 0, of -2n - 1 for n < 0 |\n\
         | `String`, `PathBuf`, `DataPath` | its length in bytes as a varint, then UTF-8 |\n\
         | `[T; n]`, `(T, U)` | the values, one after the other |\n\
         | `Vec<T>`, `BTreeMap<K, V>` | the number of entries as a varint, then the entries |\n\
         | `Option<T>` | a byte: 0 for none, 1 before the value |\n\
         | `Box<T>` | its content |\n\
         | a struct | its fields in order |\n\
         | an enum | the number of the variant as a varint, then its content |\n"
    );
    let mut waiting: VecDeque<String> = ROOTS.map(str::to_owned).into();
    let mut seen: BTreeSet<String> = BTreeSet::from(["DataPath".to_owned()]);
    while let Some(name) = waiting.pop_front() {
        let Some(Shown { rows, column, uses }) = types.shown.get(&name) else { continue };
        if !seen.insert(name.clone()) {
            continue;
        }
        waiting.extend(uses.iter().cloned());
        if let Some(alias) = types.aliases.get(&name) {
            page.push_str(&format!("\n### `{name}`\n\nThe same as `{alias}`.\n"));
            continue;
        }
        page.push_str(&format!("\n### `{name}`\n\n| name | {column} | meaning |\n|---|---|---|\n"));
        for [name, ty, meaning] in rows {
            page.push_str(&format!("| {name} | {ty} | {meaning} |\n"));
        }
    }
    page
}

#[test]
fn the_bodies_of_the_state_directory_are_documented() {
    let path = root().join("docs/FORMATS.md");
    let written = fs::read_to_string(&path).unwrap();
    let (prose, _) = written.split_once(HEADING).unwrap_or((&written, ""));
    let page = format!("{prose}{}", bodies());
    for name in ROOTS {
        assert!(page.contains(&format!("### `{name}`")), "{name} is not on the page");
    }
    assert!(!page.contains(UNKNOWN), "a type on the page is none that it can show");
    if std::env::var_os("PGREJOIN_WRITE_MESSAGES").is_some() {
        let mut file = fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, page.as_bytes()).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    assert!(written == page, "docs/FORMATS.md is not what the code says: run make messages");
}
