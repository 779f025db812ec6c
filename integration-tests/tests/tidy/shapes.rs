//! The shapes of functions and types.

use std::collections::BTreeMap;

use syn::spanned::Spanned as _;
use syn::visit::Visit;

use super::{assert_none, product};

/// Fields of a struct at most.
const FIELDS_MAX: usize = 10;
/// Structs that may have more.
const WIDE: [(&str, &str); 9] = [
    ("Config", "each is an independent choice of the operator"),
    ("RewindArgs", "each is an option of the command line"),
    ("Cli", "each is an option of the command line"),
    ("Manifest", "everything that a rewind changes, in one checked file"),
    ("Outcome", "everything that is reported"),
    ("Carriage", "everything that is counted of a transfer"),
    ("ControlFile", "PostgreSQL's own"),
    ("CheckPoint", "PostgreSQL's own"),
    ("WalSummary", "everything that WAL says was changed"),
];
/// Names that crates with a command line each have.
const PER_PROGRAM: [&str; 4] = ["Config", "Cli", "Args", "Command"];

#[derive(Default)]
struct Shapes {
    file: String,
    faults: Vec<String>,
    wide: Vec<String>,
    names: Vec<String>,
}

impl Shapes {
    fn fault(&mut self, at: proc_macro2::Span, what: &str) {
        self.faults.push(format!("{}:{}: {what}", self.file, at.start().line));
    }

    fn signature(&mut self, signature: &syn::Signature) {
        for input in &signature.inputs {
            if let syn::FnArg::Typed(argument) = input
                && is_tuple(&argument.ty)
            {
                self.fault(argument.span(), "a parameter is a tuple");
            }
        }
    }
}

/// Whether a type is a tuple of something, or a reference to one.
fn is_tuple(ty: &syn::Type) -> bool {
    match ty {
        syn::Type::Tuple(tuple) => !tuple.elems.is_empty(),
        syn::Type::Reference(reference) => is_tuple(&reference.elem),
        _ => false,
    }
}

/// The types that a path's last part is given.
fn arguments(path: &syn::Path) -> Vec<&syn::Type> {
    let Some(syn::PathArguments::AngleBracketed(arguments)) =
        path.segments.last().map(|part| &part.arguments)
    else {
        return Vec::new();
    };
    let types = arguments.args.iter().filter_map(|argument| match argument {
        syn::GenericArgument::Type(ty) => Some(ty),
        _ => None,
    });
    types.collect()
}

fn is_named(ty: &syn::Type, name: &str) -> bool {
    match ty {
        syn::Type::Path(path) => path.path.segments.last().is_some_and(|part| part.ident == name),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Shapes {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.signature(&function.sig);
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.signature(&function.sig);
        syn::visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        self.signature(&function.sig);
        syn::visit::visit_trait_item_fn(self, function);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.last().is_some_and(|part| part.ident == "Result") {
            let arguments = arguments(path);
            if arguments.first().is_some_and(|ty| is_named(ty, "Result")) {
                self.fault(path.span(), "a result holds a result");
            }
            if arguments.get(1).is_some_and(|ty| is_named(ty, "String")) {
                self.fault(path.span(), "an error is a text");
            }
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        let name = item.ident.to_string();
        if item.fields.len() > FIELDS_MAX {
            self.wide.push(name.clone());
            if !WIDE.iter().any(|(wide, _)| *wide == name) {
                let fields = item.fields.len();
                self.fault(item.ident.span(), &format!("{name} has {fields} fields"));
            }
        }
        self.names.push(name);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.names.push(item.ident.to_string());
        syn::visit::visit_item_enum(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.names.push(item.ident.to_string());
        syn::visit::visit_item_type(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.names.push(item.ident.to_string());
        syn::visit::visit_item_trait(self, item);
    }
}

/// The shapes in all files of the products.
fn shapes() -> Vec<Shapes> {
    let shapes = product().into_iter().map(|(name, text)| {
        let file = syn::parse_file(&text).expect("a file that compiles");
        let mut shapes = Shapes { file: name, ..Shapes::default() };
        shapes.visit_file(&file);
        shapes
    });
    shapes.collect()
}

#[test]
fn functions_and_structs_are_plain() {
    let shapes = shapes();
    // Texts of the command line's own parsers are shown to the operator by it.
    let faults = shapes.iter().flat_map(|shapes| &shapes.faults);
    let faults: Vec<String> =
        faults.filter(|fault| !fault.contains("/src/cli.rs")).cloned().collect();
    assert_none(&faults, "no tuple parameters, no nested results, no wide structs");
    let is_needed = |name: &str| shapes.iter().any(|shapes| shapes.wide.iter().any(|w| w == name));
    let needless = WIDE.iter().filter(|(name, _)| !is_needed(name));
    let needless: Vec<String> = needless.map(|(name, _)| (*name).to_owned()).collect();
    assert_none(&needless, "exceptions that nothing needs");
}

#[test]
fn clap_stays_with_the_command_line() {
    let allowed = ["client/src/cli.rs", "client/src/config.rs", "client/src/main.rs"];
    let faults =
        super::with_words(&["client/src"], &["clap", "StrategyArg", "OutputArg"], &allowed);
    assert_none(&faults, "clap's types end in cli.rs, config.rs and main.rs");
}

#[test]
fn a_type_name_stands_for_one_type() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for Shapes { file, names, .. } in shapes() {
        for name in names {
            files.entry(name).or_default().push(file.clone());
        }
    }
    let twice = files
        .iter()
        .filter(|(name, files)| files.len() > 1 && !PER_PROGRAM.contains(&name.as_str()));
    let faults: Vec<String> = twice.map(|(name, files)| format!("{name}: {files:?}")).collect();
    assert_none(&faults, "type names are unique");
}
