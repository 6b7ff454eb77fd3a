import TTTFormats

/// A part of a template.
indirect enum TemplateNode: Sendable {
    case text(String)
    case expression(TemplateExpression)
    case choice([(condition: TemplateExpression?, nodes: [TemplateNode])])
    case loop(String, TemplateExpression, [TemplateNode])
    /// `set name = …`, or `set name.attribute = …` of a namespace.
    case set(String, attribute: String?, TemplateExpression)

    func write(to output: inout String, _ scope: inout TemplateScope) throws {
        switch self {
        case .text(let text): output += text
        case .expression(let expression): output += try expression.value(scope).text
        case .choice(let branches):
            for (condition, nodes) in branches where try condition?.value(scope).isTrue ?? true {
                for node in nodes { try node.write(to: &output, &scope) }
                break
            }
        case .set(let name, let attribute, let expression):
            let value = try expression.value(scope)
            guard let attribute else {
                scope[name] = value
                return
            }
            guard case .record(var record) = scope[name] else {
                throw TTTError.unsupported("The chat template sets \(name).\(attribute), which is no namespace")
            }
            record[attribute] = value
            scope[name] = .record(record)
        case .loop(let name, let expression, let nodes):
            guard case .list(let items) = try expression.value(scope) else {
                throw TTTError.unsupported("The chat template goes through what is no list")
            }
            try Self.loop(name, items, nodes, to: &output, &scope)
        }
    }

    /// What is set in a loop is gone after each turn, namespaces aside.
    private static func loop(
        _ name: String, _ items: [TemplateValue], _ nodes: [TemplateNode], to output: inout String,
        _ scope: inout TemplateScope
    ) throws {
        for (index, item) in items.enumerated() {
            var inner = scope
            inner[name] = item
            inner["loop"] = .record([
                "index": .number(index + 1), "index0": .number(index), "first": .flag(index == 0),
                "last": .flag(index == items.count - 1), "length": .number(items.count),
            ])
            for node in nodes { try node.write(to: &output, &inner) }
            scope.takeNamespaces(from: inner)
        }
    }
}

extension TemplateScope {
    mutating func takeNamespaces(from inner: TemplateScope) {
        for name in names {
            if case .record = self[name], case .record = inner[name] { self[name] = inner[name] }
        }
    }
}
